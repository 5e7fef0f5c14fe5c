"""Valid configs, and the error messages of invalid ones."""

import re
from typing import Any

import pytest
from pydantic import ValidationError

from model.heinsen.config import ModelConfig, config_errors


def test_the_defaults_are_the_papers_network() -> None:
    c = ModelConfig()
    assert (c.vocab_sz, c.d_emb, c.n_layers) == (50304, 768, 24)
    assert (c.n_heads, c.d_key, c.d_val) == (24, 32, 32)
    assert c.log_values


def test_a_config_survives_json() -> None:
    config = ModelConfig(
        vocab_sz=10, d_key=3, values="linear", bos_token_id=9, eos_token_ids=(0, 9)
    )
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config
    assert not config.log_values


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"n_layer": 3}, "n_layer: Extra inputs"),
        ({"n_layers": 0}, "n_layers: "),
        ({"d_emb": "768"}, "d_emb: "),
        ({"d_key": 1.5}, "d_key: "),
        ({"values": "exp"}, "values: "),
        ({"bos_token_id": -1}, "bos_token_id: "),
        ({"vocab_sz": 5, "bos_token_id": 5}, "the config: .*token id 5 is not below vocab_sz 5"),
        ({"vocab_sz": 5, "eos_token_ids": [1, 7]}, "the config: .*token id 7 is not below"),
        ({"n_heads": 0, "typo": 1}, "n_heads: .*; typo: "),
    ],
)
def test_a_wrong_config_is_described_in_one_line(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ModelConfig(**wrong)
    line = config_errors(caught.value)
    assert re.search(named, line)
    assert "\n" not in line
