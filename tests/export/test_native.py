"""`gpt-kit export --format transformers`: a folder of transformers' own class, the same to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import gpt_kit
from hand_written_models import tiny_gpt_kit
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from gpt_kit_hf import UsageError, get_encoding, save_as_native
from gpt_kit_hf.hub.model_folder import write_model_folder


def test_the_classic_shape_is_a_gpt2(tmp_path: Path) -> None:
    ours = tiny_gpt_kit(vocab_size=257)
    write_model_folder(tmp_path / "ours", ours, get_encoding("bytes"))
    done = gpt_kit("export", tmp_path / "ours", tmp_path / "native", "--format", "transformers")
    assert done.exit_code == 0, done.stderr
    assert "as GPT2LMHeadModel\nread again" in done.stdout
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert type(native) is GPT2LMHeadModel
    ids = torch.randint(0, 257, (2, 5))
    torch.testing.assert_close(native(ids).logits, ours.eval()(ids).logits, rtol=0, atol=1e-5)
    assert "auto_map" not in json.loads((tmp_path / "native" / "config.json").read_text())
    assert not list((tmp_path / "native").glob("*.py"))
    assert AutoTokenizer.from_pretrained(tmp_path / "native")("ab")["input_ids"] == [97, 98]


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"position_embedding": "sinusoidal"}, "position_embedding='sinusoidal'"),
        ({"use_bias": False}, "use_bias=False"),
    ],
)
def test_what_no_class_has_is_refused_by_field(changed: dict[str, object], field: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"^{field}: "):
        save_as_native(tiny_gpt_kit(**changed), tmp_path / "native")
    assert list(tmp_path.iterdir()) == []
