"""Adapters, sums of adapters and circuits: from their factors, and as dense matrices.

    python tests/benchmarks/low_rank.py

One thread. The dense ways get the product for nothing: it is multiplied out beforehand.
"""

from timing import best, one_thread, table

CASES = [  # what, rows, rank, cols
    ("adapter, r = 16", 384, 16, 384),
    ("adapter, r = 16", 1536, 16, 384),
    ("adapter, r = 16", 2048, 16, 2048),
    ("OV circuit, head_dim 32", 384, 32, 384),
    ("update of an OV circuit", 384, 64, 384),
    ("10 accumulated adapters", 384, 160, 384),
    ("10 accumulated adapters", 1536, 160, 384),
]


def main():
    """Print the table."""
    import numpy as np
    import torch

    from dynamics import spectrum
    from dynamics.runs.run import Factored
    from dynamics.spectra.spectrum import singular_values_of_product

    one_thread()
    rng, rows = np.random.default_rng(0), []
    for what, m, r, n in CASES:
        left, right = (
            rng.standard_normal((m, r), np.float32),
            rng.standard_normal((r, n), np.float32),
        )
        dense = torch.from_numpy(left @ right)
        factored = Factored(left, right, 1.0, "float32")
        exact = np.linalg.svd(left.astype(float) @ right.astype(float), compute_uv=False)
        found = spectrum(factored)
        alone = best(lambda left=left, right=right: singular_values_of_product(left, right))
        seconds = best(lambda factored=factored: spectrum(factored))
        full = best(lambda dense=dense: torch.linalg.svd(dense, full_matrices=False))
        values = best(lambda dense=dense: torch.linalg.svdvals(dense))
        error = np.abs(found.s - exact).max() / exact[0]
        faster = [f"{full / each:.0f}, {values / each:.0f}" for each in (alone, seconds)]
        times = [f"{1e3 * alone:.2f}", f"{1e3 * seconds:.2f}"]
        rows.append([what, f"{m}x{n}", *times, *faster, f"{error:.0e}"])
    table(
        [
            "matrix",
            "shape",
            "ms of the singular values",
            "and noise floor",
            "times faster than a dense SVD, svdvals f32",
            "with noise floor",
            "error / s1",
        ],
        rows,
    )


if __name__ == "__main__":
    main()
