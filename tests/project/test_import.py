"""What an import of the package does."""

import subprocess
import sys

IMPORT = """
import sys
import keras

def refuse(event, arguments):
    assert event not in ("socket.connect", "subprocess.Popen", "os.system"), event

sys.addaudithook(refuse)
import keras_moe
print(keras_moe.__version__)
"""


def test_it_starts_no_process_and_opens_no_connection():
    found = subprocess.run(
        [sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip()
