"""The scales that a trial was given, whose files may change while it lasts."""

from ..sources import load_scales
from .networks import plain_network
from .trial_plan import open_runs
from .trial_runs import TrialRuns

__all__ = ['read_fingerprints']


def read_fingerprints(runs: TrialRuns, num_classes: int | None) -> dict[str, str]:
    """Reads the given scales that runs still train with; a trial whose runs are all finished can do without the files.

    Args:
        runs: The trial.
        num_classes: Number of classes.

    Returns:
        Name of an arm to the fingerprint of its scales.

    Raises:
        FileNotFoundError: If there are no such scales.
        OSError: If they cannot be downloaded.
        ValueError: If they are not scales, or those of another network.
    """
    needed = {run.arguments.get('scales') for run in open_runs(runs)}
    given = runs.settings.scales
    sources = {arm: given[arm] for arm in runs.settings.arms if arm in given and given[arm] in needed}
    if not sources:
        return {}
    network = plain_network(runs, num_classes)
    return {arm: load_scales(source, network).fingerprint for arm, source in sources.items()}
