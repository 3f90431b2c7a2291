"""main.py: the names that YAMLs use, and its command line."""

import pytest

import main
from ldm.util import get_obj_from_str


@pytest.mark.parametrize("name", ["DataModuleFromConfig", "ImageLogger", "SetupCallback", "CUDACallback"])
def test_yaml_targets_are_classes_of_the_library(name):
    found = get_obj_from_str(f"main.{name}")
    assert found is getattr(main, name)
    assert found.__module__.startswith("ldm.training."), "or __main__ and main would have different classes"


def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for word in (
        "--actual_resume",
        "--placeholder_string",
        "--train_data_dir",
        "130",
        "143",
        "SIGUSR1",
        "override",
    ):
        assert word in text


def test_wrong_command_line(capsys):
    assert main.main(["--nonsense"]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: unknown flag --nonsense") and shown.err.count("\n") == 1
