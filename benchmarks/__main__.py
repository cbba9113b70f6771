"""``make bench ARGS="NAME ..."``: runs one of the files of this folder; the rest of ARGS is for it.

continual  every strategy on a stream in miniature
cuda       the Triton forms on a GPU: checks and figures in one call
data       what packing and stored features are worth on the demo's data
detection  the experts' decoder beside the dense one, whole detectors at 640 pixels
experts    the experts' kernels beside every implementation a user could pick instead (the default)
model      what the kernels do to a training step and to decoding
scale      tokens a second and memory by strategy on one and two processes
serve      many clients of one server, beside one at a time
uni_moe_study  specialised experts against copies and a dense control, placement, top-k, balance, modalities
video_order  what came first: frames kept in time beside Uni-MoE's mean over frames
"""

import runpy
import sys
from pathlib import Path

sys.path.pop(0)  # this folder: a file in it must not hide a package of the same name
names = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__main__")
name = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else "experts"
if name not in names:
    sys.exit(f"unimoe: error: no benchmark {name!r}, expected one of {', '.join(names)}")
runpy.run_path(str(Path(__file__).with_name(f"{name}.py")), run_name="__main__")
