"""``python -m mlx_turboquant`` is ``mlx_tq``."""

from .cli.app import main

main()
