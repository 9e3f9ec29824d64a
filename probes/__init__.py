"""Probes read models while they train: the recorder of a training run, and its schedules."""

from probes.live.settings import Live
from probes.recorder import Recorder
from probes.schedule import at_steps, every, log_spaced

__all__ = ["Live", "Recorder", "at_steps", "every", "log_spaced"]
