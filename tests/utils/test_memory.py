import platform
import subprocess
import sys

import pytest

from keras_moe.utils import memory

# New pages of the process, for bytes that have taken memory before.
PAGES = """
import resource
from keras_moe.utils.memory import is_kept, keep_freed_memory

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * 2**27
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

pages()
returned = pages()
kept = keep_freed_memory()
pages()
print(kept and is_kept(), returned > 10 * pages(), returned > 10)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of the GNU C library")
def test_freed_memory_is_kept():
    found = subprocess.run(
        [sys.executable, "-c", PAGES], capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["True", "True", "True"]


@pytest.mark.parametrize("error", [AttributeError, TypeError])
def test_other_c_libraries(error, monkeypatch):
    def library(name):
        raise error

    monkeypatch.setattr(memory.ctypes, "CDLL", library)
    assert memory.keep_freed_memory() is False
    assert memory.is_kept() is False
