"""Metrics to TensorBoard, when asked for with `--track tensorboard`."""

from zoo.core.entries import TrackerEntry
from zoo.core.hookspecs import hookimpl


@hookimpl
def zoo_register_trackers() -> list[TrackerEntry]:
    """Offer `tensorboard`."""
    return [
        TrackerEntry(
            name="tensorboard",
            target="zoo.plugins.tracking.tensorboard:TensorBoard",
            help="event files in RUN/tensorboard (needs the extra 'tensorboard')",
        )
    ]
