"""Helpers that know nothing of experts: argument checks, initializers, serialization.

May import: nothing of this package.
"""
