"""Give arrays in place of prompts: the text states of two prompts, mixed. For students of FLUX.

python blend_prompts.py BUNDLE FOLDER
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

from arcflow_runtime import Bundle, Pipeline


def encode(bundle: Bundle, prompt: str) -> tuple[np.ndarray, np.ndarray]:
    """T5's states [1, T, Dt] and CLIP's pooled vector [1, Dp] of a short prompt."""
    text, results = bundle.manifest.text, []
    for part, name, length, pad in (
        ("text_encoder_2", "tokenizer_2", text.max_sequence_length, text.t5_pad_token_id),
        ("text_encoder", "tokenizer", text.clip_tokens, text.clip_pad_token_id),
    ):
        ids = Tokenizer.from_file(str(bundle.path(bundle.manifest.tokenizers[name]))).encode(prompt).ids
        padded = np.array([ids + [pad] * (length - len(ids))], np.int64)
        session = onnxruntime.InferenceSession(bundle.path(bundle.manifest.parts[part].graph))
        results.append(session.run(None, {"input_ids": padded})[0])
    return results[0], results[1]


path, folder = Path(sys.argv[1]), Path(sys.argv[2])
one, other = (encode(Bundle.open(path), prompt) for prompt in ("a red circle", "a blue square"))
with Pipeline.load(path) as pipe:
    for share in (0.0, 0.5, 1.0):
        states, pooled = ((1 - share) * a + share * b for a, b in zip(one, other, strict=True))
        image = pipe(prompt_embeds=states, pooled_prompt_embeds=pooled, seed=3).images[0]
        image.save(folder / f"blend-{share:.1f}.png")
