from __future__ import annotations

import json

from benchmarks import transfer
from ldm.data.creatures.world import ATTRIBUTES


def test_the_table_compares_the_map_with_both_baselines(tmp_path, capsys):
    assert transfer.main(["--captions", "256", "--width", "16", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "transfer.json").read_text())["data"]
    assert list(found)[-1] == "second text encoder" and len(found) == len(transfer.NOISES) + 1
    exact = found["rotation, noise 0"]
    assert exact["map"] > 0.999 and exact["map"] > exact["nearest"] > exact["mean"]
    by_noise = [found[f"rotation, noise {noise:g}"]["map"] for noise in transfer.NOISES]
    assert by_noise == sorted(by_noise, reverse=True)
    assert "| second text encoder  | 16" in capsys.readouterr().out


def test_captions_come_with_the_values_of_their_attributes():
    texts, labels = transfer.described(range(5), seed=0)
    assert len(texts) == 5 and labels.shape == (5, len(ATTRIBUTES))
    assert transfer.described(range(5), seed=0)[0] == texts != transfer.described(range(5), seed=1)[0]
