"""The command line of scripts/embedded_model.py."""

from __future__ import annotations

from scripts import embedded_model


def test_what_assemble_does_not_know_is_an_error(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert embedded_model.main(["assemble", "--outt", "elsewhere"]) == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --outt elsewhere (see --help)\n"
    assert embedded_model.main(["assemble"]) == 1
    assert capsys.readouterr().err.startswith("error: the denoiser is not trained yet")


def test_overrides_are_handed_on_to_main(monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(embedded_model, "train_stages", lambda *words: seen.append(words))
    assert embedded_model.main(["train", "--stage", "ldm", "--max_steps", "5"]) == 0
    assert seen == [(["ldm"], False, ["--max_steps", "5"])]
