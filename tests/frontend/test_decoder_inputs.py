"""An encoder-decoder that is given labels alone, as transformers trains it."""

from typing import Any

import torch
from torch import Tensor, nn

import hawqfx
from hawqfx.frontend.data import Batch, gather
from hawqfx.frontend.decoder_inputs import with_decoder_inputs

IDS = torch.randint(3, 20, (4, 6), generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(3, 20, (4, 5), generator=torch.Generator().manual_seed(1))


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(labels[:, :1]), labels[:, :-1]], 1)

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor | None = None) -> dict[str, Tensor]:
        if decoder_input_ids is None:
            raise ValueError("decoder_input_ids are needed")
        read = torch.relu(self.inner(self.table(input_ids))).mean(1, keepdim=True)
        return {"logits": self.head(self.table(decoder_input_ids) + read)}


def test_the_inputs_of_the_decoder_are_its_labels_shifted() -> None:
    torch.manual_seed(0)
    model: Any = EncoderDecoder().eval()
    compiled = hawqfx.compile(model, "weight_bits=6", [{"input_ids": IDS, "labels": LABELS}], sensitivity="mse")
    expected = nn.functional.cross_entropy(
        model(IDS, model.prepare_decoder_input_ids_from_labels(LABELS))["logits"].flatten(0, 1), LABELS.flatten()
    )
    assert abs(compiled.calibration_loss()[0] - float(expected)) < 1e-5
    assert "labels are not shifted" in compiled.summary()


def test_what_is_given_stays() -> None:
    given = gather([{"input_ids": IDS, "decoder_input_ids": LABELS, "labels": LABELS}])
    assert with_decoder_inputs(EncoderDecoder(), given) == given
    plain = (Batch((IDS,), {}, LABELS),)
    assert with_decoder_inputs(EncoderDecoder(), plain) == plain
    assert with_decoder_inputs(nn.Linear(2, 2), given) == given
