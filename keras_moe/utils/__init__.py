"""Helpers that know nothing of experts: argument checks, initializers, memory, files.

May import: nothing of this package.
"""
