"""Metrics to TensorBoard, when asked for with `--track tensorboard`."""

from zoo import TrackerEntry, hookimpl

ZOO_PLUGIN_API = 1


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
