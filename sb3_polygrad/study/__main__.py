"""``python -m sb3_polygrad.study``."""

from sb3_polygrad.study.runner import main

main()
