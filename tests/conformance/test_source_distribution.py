"""The suites themselves are there: without them the rest of this folder cannot be collected."""

import subprocess

import pytest
from conformance_mini import source_distribution
from conformance_mini.source_distribution import SuiteUnavailableError, fetched_suite

MIXINS = (
    "test_configuration_common.py",
    "test_fsdp_mixin.py",
    "test_modeling_common.py",
    "test_pipeline_mixin.py",
    "test_tensor_parallel_mixin.py",
    "test_tokenization_common.py",
    "test_tokenizers_backend_mixin.py",
    "test_training_mixin.py",
)


def test_source_distribution_is_at_hand() -> None:
    problem = None
    try:
        folder = fetched_suite()
    except SuiteUnavailableError as error:
        problem = str(error)
    if problem:
        pytest.fail(problem, pytrace=False)
    assert [name for name in MIXINS if not (folder / "transformers_tests" / name).is_file()] == []


def test_what_pip_says_is_in_the_error(tmp_path, monkeypatch) -> None:
    def refused(command, **kwargs):
        return subprocess.CompletedProcess(
            command, 1, "", "WARNING: a warning\nERROR: No matching distribution found\n"
        )

    monkeypatch.setenv("MINI_CONFORMANCE_CACHE", str(tmp_path))
    monkeypatch.setattr(source_distribution.subprocess, "run", refused)
    with pytest.raises(
        SuiteUnavailableError, match=r"pip could not fetch it \(ERROR: No matching distribution found\)"
    ):
        fetched_suite()
    assert not list(tmp_path.glob("transformers-*-tests-*[0-9]")), "a failed fetch must leave no folder behind"
