"""``unimoe consolidate``: the model of an unfinished run."""

from pathlib import Path

from unimoe.errors import UserError
from unimoe.training.lightning_cli import CONFIG_FILE

from .fit import main


def consolidate(run: str, output: str) -> None:
    """Write the latest checkpoint of an unfinished run as a model folder.

    Runs in one process on the CPU, however many processes wrote the checkpoint. Call it from the run's
    working directory if its settings contain relative paths. The run can be resumed afterwards.

    Args:
        run: output folder of an unfinished run; that of a finished one is a model folder already.
        output: folder of the result, which must not exist.

    Raises:
        UserError: ``run`` holds no checkpoint, or ``output`` exists.
    """
    config = Path(run) / "checkpoints" / CONFIG_FILE
    if not config.is_file():
        raise UserError(f"RUN {run} holds no checkpoints; expected the output folder of an unfinished run")
    main(["fit", "-c", str(config), "--consolidate", output])
