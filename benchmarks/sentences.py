"""all-MiniLM-L6-v2 (Wang et al. 2020; Reimers and Gurevych 2019): texts to 384 numbers, normalised, by meaning."""

import email
import email.policy
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 384  # numbers of a sentence
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


class Classifier(nn.Module):
    """Tokens (N, length) and which of them are no padding -> logits (N, classes), linear in the sentence's vector."""

    def __init__(self, encoder: SentenceEncoder, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.encoder(input_ids, attention_mask))

    def fit(self, vectors: Tensor, labels: Tensor, decay: float = 1e-5) -> None:
        """Train the head alone, by logistic regression from the vectors (N, width) of texts."""
        torch.manual_seed(0)
        self.head.reset_parameters()
        optimizer = torch.optim.LBFGS(self.head.parameters(), max_iter=500, line_search_fn="strong_wolfe")

        def loss() -> float:
            optimizer.zero_grad()
            found = F.cross_entropy(self.head(vectors), labels) + decay * self.head.weight.square().sum()
            found.backward()
            return float(found.detach())

        optimizer.step(loss)


def mail_text(content: bytes) -> str:
    """The subject of a mail and what it says, without tags."""
    mail: Any = email.message_from_bytes(content, policy=email.policy.default)
    parts = [part for part in mail.walk() if part.get_content_maintype() == "text"]
    said = b" ".join(part.get_payload(decode=True) for part in parts).decode("ascii", "replace")
    subject = str(mail["subject"] or "").encode("ascii", "replace").decode()
    return " ".join(re.sub(r"<[^>]*>", " ", f"{subject}. {said}").split())


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
