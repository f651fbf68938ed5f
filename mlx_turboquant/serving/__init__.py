"""The HTTP side of ``mlx_tq.server``: what stands between clients and generation.

Imports starlette, uvicorn, pydantic and prometheus_client: ``pip install
'mlx-tq[server]'``. Generating is ``integrations/``'s.
"""
