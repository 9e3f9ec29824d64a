"""The command line: each verb is one call of the library."""


def main() -> None:
    """The console script `dynamics`."""
    from dynamics.cli.app import main as run

    run()
