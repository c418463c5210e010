"""What is particular to each model family when a bundle is read and run: one table, by the manifest's `family`.

A new family is an entry here, one in `signatures.SIGNATURES`, and whatever code an entry names that does not exist yet.
Nothing else in the runtime compares a family's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from arcflow_runtime.errors import BundleError

Family = Literal["flux", "qwen-image"]
#: How prompts become token ids: CLIP's and T5's padded, or one text in a chat template at its own length.
TextKind = Literal["clip-t5", "template"]

#: Tokens of a typical prompt, for which kernels are tuned and work is counted where texts are not padded.
USUAL_PROMPT_TOKENS = 128
#: Guidance scale where a request gives none and the student takes one.
DEFAULT_GUIDANCE_SCALE = 3.5


@dataclass(frozen=True)
class FamilyFacts:
    """One family.

    Args:
        text: how prompts become token ids.
        tokenizers: the tokenizers that a bundle must have.
        rounds_timesteps: the reference multiplies sigma by 1000 in `reference_dtype`; otherwise in float32.
        rounds_rotary: the reference rounds cosines and sines to `reference_dtype`.
        centred_positions: image positions count from the centre, and the text's follow on all axes; otherwise they
            count from the corner, and the text has position 0.
    """

    text: TextKind
    tokenizers: tuple[str, ...]
    rounds_timesteps: bool
    rounds_rotary: bool
    centred_positions: bool

    def usual_text_tokens(self, max_sequence_length: int) -> int:
        """Text tokens of a typical request: all of them where texts are padded."""
        return max_sequence_length if self.text == "clip-t5" else min(max_sequence_length, USUAL_PROMPT_TOKENS)


FAMILIES: dict[str, FamilyFacts] = {
    "flux": FamilyFacts("clip-t5", ("tokenizer", "tokenizer_2"), True, True, False),
    "qwen-image": FamilyFacts("template", ("tokenizer",), False, False, True),
}


def facts(family: str) -> FamilyFacts:
    """The facts about a family.

    Raises:
        BundleError: it is not in the table.
    """
    if family not in FAMILIES:
        raise BundleError(
            f"family must be one of {list(FAMILIES)}, got {family!r}; update arcflow if it is a newer one"
        )
    return FAMILIES[family]
