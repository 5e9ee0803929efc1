"""Label every image of a run by the trained network.

    selective-ray submit predict \\
        --run s3://BUCKET/runs/one

The same by Ray's own command, from a checkout:

    ray job submit --working-dir . -- python jobs/prediction.py \\
        --run s3://BUCKET/runs/one
"""

import sys

from selective_ray.cli import app

if __name__ == "__main__":
    app(["predict", *sys.argv[1:]])
