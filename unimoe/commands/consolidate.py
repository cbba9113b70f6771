"""``unimoe consolidate``: the model that an unfinished run has come to."""

from pathlib import Path

from unimoe.errors import UserError
from unimoe.training.cli import CONFIG_FILE

from .fit import main


def consolidate(run: str, output: str) -> None:
    """Write what the newest checkpoint of a run holds as a folder like that of a finished stage.

    One process does so, in the memory of the CPU, however many have written the checkpoint. Call it where
    the run was called, if its settings name files by relative paths. The run can go on afterwards.

    Args:
        run: output folder of a run that is not finished; what a finished one leaves is such a folder already.
        output: folder of the result, which must not be there yet.
    """
    config = Path(run) / "checkpoints" / CONFIG_FILE
    if not config.is_file():
        raise UserError(f"RUN {run} holds no checkpoints; expected the output folder of an unfinished run")
    main(["fit", "-c", str(config), "--consolidate", output])
