"""The differences between model families when a bundle is read and run: a manifest's `family` -> `FamilyFacts`.

To add a family, add an entry here and one in `signatures.SIGNATURES`, and write the code that an entry needs and that
does not exist yet. No other module of the runtime compares a family's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from arcflow_runtime.errors import BundleError

Family = Literal["flux", "qwen-image"]
#: How prompts become token ids: padded ids for CLIP and T5, or unpadded ids of a chat template with the prompt.
TextKind = Literal["clip-t5", "template"]

#: Number of tokens of a typical prompt. If texts are not padded, kernels are tuned and FLOPs counted for it.
USUAL_PROMPT_TOKENS = 128
#: Default guidance scale of a student with guidance.
DEFAULT_GUIDANCE_SCALE = 3.5


@dataclass(frozen=True)
class FamilyFacts:
    """The facts about one family.

    Args:
        text: how prompts become token ids.
        tokenizers: the tokenizers that a bundle must have.
        rounds_timesteps: the reference multiplies sigma by 1000 in `reference_dtype`; otherwise in float32.
        rounds_rotary: the reference rounds cosines and sines to `reference_dtype`.
        centred_positions: image positions count from the centre, and the text's follow on all axes; otherwise they
            count from the corner, and the text has position 0.
        true_cfg: a straight student is guided by a second call of the network with a negative prompt.
    """

    text: TextKind
    tokenizers: tuple[str, ...]
    rounds_timesteps: bool
    rounds_rotary: bool
    centred_positions: bool
    true_cfg: bool

    def usual_text_tokens(self, max_sequence_length: int) -> int:
        """Number of text tokens in a typical request; the maximum if texts are padded."""
        return max_sequence_length if self.text == "clip-t5" else min(max_sequence_length, USUAL_PROMPT_TOKENS)


FAMILIES: dict[str, FamilyFacts] = {
    "flux": FamilyFacts("clip-t5", ("tokenizer", "tokenizer_2"), True, True, False, False),
    "qwen-image": FamilyFacts("template", ("tokenizer",), False, False, True, True),
}


def facts(family: str) -> FamilyFacts:
    """The facts about a family.

    Raises:
        BundleError: the family is not in the table.
    """
    if family not in FAMILIES:
        raise BundleError(
            f"family must be one of {list(FAMILIES)}, got {family!r}; update arcflow if it is a newer one"
        )
    return FAMILIES[family]
