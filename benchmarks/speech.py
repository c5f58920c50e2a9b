"""Recorded sentences and words, in the forms that networks for speech take.

All draws come from the generators that are passed in, so that the same windows come out each time.
"""

import wave
from collections.abc import Sequence
from pathlib import Path

import data
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.signal import resample_poly
from torch import Tensor

Sound = NDArray[np.float32]  # (samples,) from -1 to 1, at RATE

RATE = 16_000  # Hz
FRAME, HOP = 1024, 160  # samples of a frame, and from one frame to the next: 64 and 10 ms
# no speech, besides the folder silence/
TONES = ("ascending-2tone.wav", "beep.wav", "beeperr.wav", "descending-2tone.wav")


def recordings(shortest: float = 0.0, longest: float = np.inf) -> dict[str, Sound]:
    """Speech that takes so many seconds, by the files' names without .wav, in their order."""
    root = data.recordings()
    names = sorted(path.relative_to(root).as_posix() for path in root.glob("**/*.wav"))
    spoken = [name for name in names if name not in TONES and not name.startswith("silence/")]
    sounds = {name.removesuffix(".wav"): _read(root / name) for name in spoken}
    return {name: sound for name, sound in sounds.items() if shortest <= len(sound) / RATE <= longest}


def _read(path: Path) -> Sound:
    """16-bit mono at 8 kHz, which is how all of these were recorded, at twice that rate."""
    with wave.open(str(path)) as file:
        if (file.getnchannels(), file.getsampwidth(), file.getframerate()) != (1, 2, RATE // 2):
            raise SystemExit(f"{path} is not 16-bit mono at {RATE // 2} Hz")
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    return resample_poly(samples / 2**15, 2, 1).astype(np.float32)


def frames(sounds: Sequence[Sound], random: np.random.Generator) -> Tensor:
    """One frame of each sound, drawn from the louder half of its frames; (N, 1024), with mean 0 and deviation 1."""
    drawn = []
    for sound in sounds:
        padded = np.pad(sound, FRAME // 2)
        every = np.lib.stride_tricks.sliding_window_view(padded, FRAME)[::HOP]
        louder = np.argsort(every.std(1), kind="stable")[len(every) // 2 :]
        frame = every[random.choice(louder)]
        drawn.append((frame - frame.mean()) / frame.std(ddof=1))
    return torch.from_numpy(np.stack(drawn).astype(np.float32))


def log_mel(sounds: Sequence[Sound]) -> Tensor:
    """Whisper's input (N, 80, 3000): each sound and the silence after it, 30 s, in frames of 10 ms."""
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(feature_size=80)(
        list(sounds), sampling_rate=RATE, return_tensors="pt"
    ).input_features
