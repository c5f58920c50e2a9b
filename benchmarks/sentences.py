"""all-MiniLM-L6-v2 (Wang et al. 2020; Reimers and Gurevych 2019): texts to 384 numbers, normalised, by meaning."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

LENGTH = 64  # tokens; what is longer is cut off, what is shorter is padded


class SentenceEncoder(nn.Module):
    """Tokens (N, length) and which of them are no padding -> unit vectors (N, 384), the mean over tokens."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        counted = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * counted).sum(1) / counted.sum(1), dim=1)


def load(folder: Path) -> SentenceEncoder:
    """The trained network in eval mode, from files alone."""
    from transformers import BertConfig, BertModel

    # Eager attention adds a mask of -3.4e38 to the scores, a sum that has no 8-bit form; this takes the mask as it is.
    config = BertConfig.from_pretrained(folder, attn_implementation="sdpa", local_files_only=True)
    bert: nn.Module = BertModel(config, add_pooling_layer=False)
    missing, _ = bert.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    if missing:
        raise RuntimeError(f"{folder} lacks {missing}")
    return SentenceEncoder(bert).eval()


def tokenize(folder: Path, texts: list[str]) -> dict[str, Tensor]:
    """The inputs of the network for some texts."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    encoded = tokenizer.encode_batch(texts)
    return {
        "input_ids": torch.tensor([each.ids for each in encoded]),
        "attention_mask": torch.tensor([each.attention_mask for each in encoded]),
    }
