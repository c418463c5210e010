import numpy as np

def randn(seed: int, out: np.ndarray) -> None: ...
def update(
    means: np.ndarray,
    logweights: np.ndarray,
    loggammas: np.ndarray,
    latents: np.ndarray,
    out: np.ndarray,
    modes: int,
    channels: int,
    sub_pixels: int,
    step: float,
) -> None: ...
