"""Measure how rank evolves while a language model trains.

    import dynamics as dy

    run = dy.open_run("run.zarr")
    analysis = dy.analyze(run)
    both = dy.compare({"full": "full/run.zarr", "relora": "relora/run.zarr"})
    dy.plot_trajectory(analysis, "effective_rank", by="layer")

The public names stand in `__init__.pyi`. Each is imported when it is first used, so that
`dynamics --help` does not load torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
