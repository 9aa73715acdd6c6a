"""Training on several devices equals training on one, on every backend."""

import json

import pytest
from backends import BACKENDS, TESTS, run_python


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Results of the benchmark, by backend."""
    folder = tmp_path_factory.mktemp("devices")
    script = TESTS.parent / "benchmarks" / "devices.py"
    for backend in BACKENDS:
        arguments = "--meshes", "2x4", "8x1", "8", "--output", folder
        run_python(script, *arguments, backend=backend)
    assert (folder / "devices.md").read_text().count("| 2x4 |") == 3
    return {
        backend: json.loads((folder / f"devices_{backend}.json").read_text())
        for backend in BACKENDS
    }


@pytest.mark.parametrize(
    "backend, rows",
    [
        # Three kinds of routing on three meshes, and two kinds on two processes.
        ("jax", 11),
        # Three kinds of routing on two replicas.
        ("tensorflow", 3),
        # Three kinds of routing on two processes.
        ("torch", 3),
    ],
)
def test_several_devices_match_one(measured, backend, rows):
    assert len(measured[backend]) == rows
    for row in measured[backend]:
        assert row["logs"] < 1e-4, row
        assert row["weights"] < 1e-4, row
        assert row["means of replicas"] < 0.2, row


def test_communication_matches_the_formula(measured):
    """The transfers match the formula, apart from the router's probabilities."""
    tokens, experts = 16 * 64, 16
    meshes = [row for row in measured["jax"] if "bytes" in row]
    assert len(meshes) == 9
    for row in meshes:
        moved, expected = sum(row["bytes"].values()), sum(row["formula"].values())
        assert 0.99 * expected <= moved, row
        router_bytes = 4 * experts * tokens // int(row["where"].split("x")[0])
        assert moved <= 1.02 * expected + 4 * router_bytes, row
        largest = max(row["bytes"], key=row["bytes"].get)
        assert largest == max(row["formula"], key=row["formula"].get)
