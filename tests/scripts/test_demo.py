"""What scripts/demo.py does with the results of the two commands that it runs."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf
from PIL import Image

from ldm.images import open_image
from scripts import demo


def test_the_sheet_shows_this_run_and_not_an_earlier_one(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "out" / "logs" / "zuzu_earlier").mkdir(parents=True)
    used = []

    def run(arguments) -> None:
        folder = Path(arguments[arguments.index("-l") + 1])
        (folder / "bobo_now").mkdir()

    def generate(prompts: list[str], outdir: Path, embeddings: Path | None) -> list[list[Image.Image]]:
        used.append((prompts[0], embeddings))
        return [[Image.new("RGB", (32, 32), "red")] * 2 for _ in prompts]

    monkeypatch.setattr(demo, "_run", run)
    monkeypatch.setattr(demo, "_generate", generate)
    monkeypatch.chdir(demo.ROOT)
    assert demo.main(["--outdir", str(tmp_path / "out")]) == 0
    word = OmegaConf.load(
        demo.ROOT / demo.CONFIG
    ).model.params.personalization_config.params.initializer_words[0]
    now = tmp_path / "out" / "logs" / "bobo_now" / "checkpoints" / "embeddings.pt"
    assert used[0] == ("a photo of *", now) and used[-1] == (f"a photo of a {word}", None)
    assert open_image(tmp_path / "out" / "demo.png").width > 5 * 32
    output = capsys.readouterr().out
    assert f"embeddings: {now}" in output and "colours shared with the images" in output
