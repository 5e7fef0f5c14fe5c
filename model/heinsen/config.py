"""The architecture of a network, as stored in a checkpoint's `config.json`."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

PositiveInt = Annotated[int, Field(ge=1, le=1 << 24)]
TokenId = Annotated[int, Field(ge=0)]

FASTEST_DECAY = 0.5
"""Maximum decay per token, in nats: a chunk of 64 tokens spans at most 32 nats by decay alone,
which float32 holds without loss."""

SLOWEST_DECAY = 2.0**-12
"""Slowest initial decay, in nats per token; new networks spread their decays from the fastest to
it."""

DECAY_RANK = 32
"""Rank of the projection to the decays."""

EXTENSIONS = ("decay", "token_shift", "output_gate")
"""Options beyond the paper."""


class ModelConfig(BaseModel):
    """Arguments of the reference's `ModelConfig`, plus what serving needs.

    The defaults are the paper's published network of 124.9 M parameters.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    vocab_sz: PositiveInt = 50304
    d_emb: PositiveInt = 768
    n_layers: PositiveInt = 24
    n_heads: PositiveInt = 24
    d_key: PositiveInt = 32
    d_val: PositiveInt = 32

    values: Literal["log", "linear"] = "log"
    """`log`: the network computes log v and passes log y on (v > 0). `linear`: v of any sign."""

    decay: bool = False
    """Beyond the paper: each key channel decays at a rate that depends on the token."""

    token_shift: bool = False
    """Beyond the paper: queries, keys and values are mixed with the previous token's."""

    output_gate: bool = False
    """Beyond the paper: the attention output is multiplied by a gate computed from the layer's
    input."""

    bos_token_id: TokenId | None = None
    """Token prepended to a text prompt on a fresh state; None for no token."""

    eos_token_ids: tuple[TokenId, ...] = Field(default=(), strict=False)
    """Tokens that end a generation; not part of the text."""

    @property
    def log_values(self) -> bool:
        return self.values == "log"

    @property
    def extensions(self) -> tuple[str, ...]:
        """Names of the enabled extensions."""
        return tuple(name for name in EXTENSIONS if getattr(self, name))

    @model_validator(mode="after")
    def _tokens_are_in_the_vocabulary(self) -> Self:
        ids = {*self.eos_token_ids, *([] if self.bos_token_id is None else [self.bos_token_id])}
        if outside := [token_id for token_id in sorted(ids) if token_id >= self.vocab_sz]:
            raise ValueError(f"token id {outside[0]} is not below vocab_sz {self.vocab_sz}")
        return self


def config_errors(error: ValidationError) -> str:
    """A config's validation errors, in one line."""
    return "; ".join(
        f"{'.'.join(map(str, e['loc'])) or 'the config'}: {e['msg']}" for e in error.errors()
    )
