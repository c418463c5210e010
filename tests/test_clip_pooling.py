"""CLIP's pooled vector is taken at the end-of-text token, as transformers takes it, for both kinds of configs."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from arcflow_export.models.text import ClipText

#: The highest id of the vocabulary, which ends and pads every text of FLUX.1-dev's tokenizer.
END = 63


@pytest.mark.parametrize("eos_token_id", [2, END])
def test_the_end_of_the_text_is_found(eos_token_id):
    """FLUX.1-dev's config, older than transformers 4.31, says 2, where the highest id ends the text, not a 2 in it."""
    config = CLIPTextConfig(
        vocab_size=END + 1,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=10,
        eos_token_id=eos_token_id,
        bos_token_id=1,
        pad_token_id=END,
    )
    torch.manual_seed(0)
    model = CLIPTextModel(config).eval()
    ids = torch.tensor([[1, 5, 2, 9, END, END, END, END], [1, 2, END, END, END, END, END, END]])
    with torch.no_grad():
        result = model(ids)
        pooled = ClipText(copy.deepcopy(model))(ids)
    # The same products; attention may add in another order.
    torch.testing.assert_close(pooled, result.pooler_output, rtol=1e-5, atol=1e-6)
    ends = torch.stack([result.last_hidden_state[0, 4], result.last_hidden_state[1, 2]])
    torch.testing.assert_close(pooled, ends, rtol=1e-5, atol=1e-6)
