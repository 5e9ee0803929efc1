"""Cluster the embeddings into as many clusters as the budget, after embedding where that is not done.

    selective-ray submit cluster --config jobs/configs/imagenet.toml \\
        --images s3://BUCKET/images --run s3://BUCKET/runs/one --budget 2911

The same by Ray's own command, from a checkout:

    ray job submit --working-dir . -- python jobs/clustering.py --config jobs/configs/imagenet.toml \\
        --images s3://BUCKET/images --run s3://BUCKET/runs/one --budget 2911
"""

import sys

from selective_ray.cli import app

if __name__ == "__main__":
    app(["cluster", *sys.argv[1:]])
