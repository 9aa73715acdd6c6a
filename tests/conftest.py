import collections
import contextlib
import os

# Most of the test time on JAX is compilation, which these flags reduce to a quarter.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false",
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.abspath(".pytest_cache/jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import keras
import numpy as np
import pytest
import versions

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    # Dependency optimization (TensorFlow 2.21, CPU, without XLA) sometimes updates a
    # variable before all of its reads have run. With two `Dense` layers, SGD(1.0) and a
    # loss of sum(outputs), 14 of 60 models had a gradient of the updated weights.
    tf.config.optimizer.set_experimental_options({"dependency_optimization": False})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skips what quantizes experts where an old Keras cannot, whatever else it does."""
    try:
        return (yield)
    except Exception as error:
        is_old = versions.KERAS < versions.WITH_QUANTIZATION
        if is_old and any(text in str(error) for text in versions.NO_QUANTIZATION):
            pytest.skip(versions.SKIPPED)
        raise


@pytest.fixture(autouse=True)
def fixed_seed():
    keras.utils.set_random_seed(1)


@pytest.fixture(autouse=True, scope="module")
def freed_programs():
    """Frees compiled programs, of which old versions of JAX map too much memory."""
    yield
    if versions.BACKEND == "jax" and versions.OF_BACKEND < (0, 5):
        import jax

        jax.clear_caches()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def policy():
    """Sets the global dtype policy for one test."""
    before = keras.config.dtype_policy()
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy(before)


@pytest.fixture
def float64():
    with contextlib.ExitStack() as stack:
        if keras.backend.backend() == "jax":
            import jax

            jax.config.update("jax_enable_x64", True)
            stack.callback(jax.config.update, "jax_enable_x64", False)
        keras.config.set_floatx("float64")
        keras.config.set_dtype_policy("float64")
        yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


def pytest_terminal_summary(terminalreporter):
    """Prints the numbers that tests pass to `record_property`, summed per file."""
    counts = collections.defaultdict(collections.Counter)
    for report in terminalreporter.getreports("passed"):
        numbers = {k: n for k, n in report.user_properties if isinstance(n, int)}
        counts[report.fspath].update(numbers)
    for file, numbers in counts.items():
        if numbers:
            text = ", ".join(f"{n:,} {name}" for name, n in numbers.items())
            terminalreporter.write_line(f"{file}: {text}")
