"""Trackers, to which a run sends what `metrics.jsonl` has: TensorBoard, trackio and wandb."""

from pathlib import Path

from .build import Run


def start_trackers(run: Run) -> set[Path]:
    """
    Opens the trackers that `report_to` names. One that knows the run already goes on with it. Every process calls it.

    Returns:
        On the main process, the files that were in the run folder before: trackers write there, too.

    Raises:
        ValueError: if one does not start, as without a login or a network. The folder is as it was then.
    """
    names, before, error = run.arguments.monitoring.report_to, set(), None
    if run.accelerator.is_main_process:
        before = run.run_folder.files()
        name = f"{run.folder.name}-{run.state.tracker_id}"
        settings = {
            key: value if isinstance(value, int | float | str | bool) else str(value)
            for key, value in run.arguments.as_dict().items()
        }
        arguments = {
            "wandb": {"id": run.state.tracker_id, "name": name, "resume": "allow", "dir": str(run.folder)},
            "trackio": {"name": name, "resume": "allow"},
        }
        try:
            if names:
                run.accelerator.init_trackers("mini", settings, {key: arguments.get(key, {}) for key in names})
        except Exception as caught:  # each tracker has errors of its own
            error = ValueError(f"report_to {' '.join(names)} did not start: {caught}")
            run.run_folder.remove(run.run_folder.files() - before)
    run.parallel.raise_everywhere(error)
    return before
