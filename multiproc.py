"""Start one training process per GPU, on one node or many:  python ./multiproc.py --nproc_per_node 8 ./main.py ARGS…

`lucidprune launch` is the same; `image_classification/launching.py` says what it does.
"""

from image_classification.exit_codes import answer_signals_while_importing

if __name__ == "__main__":
    answer_signals_while_importing()

import sys

from image_classification.launching import main, parse

__all__ = ["main", "parse"]

if __name__ == "__main__":
    sys.exit(main())
