"""Whisper in two parts, against the whole of transformers."""

import torch
import whisper


@torch.no_grad()
def test_listener_and_writer_are_the_whole_token_by_token() -> None:
    torch.manual_seed(0)
    model = whisper.build()
    listener, writer = whisper.Listener(model).eval(), whisper.Writer(model).eval()
    features, tokens = torch.randn(2, 80, 2 * whisper.MOMENTS), torch.randint(0, whisper.WORDS, (2, 5))
    wanted = model(input_features=features, decoder_input_ids=tokens).logits
    heard, past = listener(features), whisper.no_past(2)
    assert torch.allclose(writer(tokens, **heard, **past)["logits"], wanted, atol=1e-4)
    found = []
    for token in tokens.split(1, 1):
        answer = writer(token, **heard, **past)
        found.append(answer.pop("logits"))
        past = {name.replace("next", "past"): tensor for name, tensor in answer.items()}
    # float32 sums in another order, of logits that are about one
    assert torch.allclose(torch.cat(found, 1), wanted, atol=1e-4)
