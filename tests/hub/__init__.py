# SPDX-License-Identifier: Apache-2.0
"""A miniature of the Hugging Face hub: repositories in the real layouts, and a server on loopback.

    repositories = hub.write_all(folder)
    with hub.serve(repositories) as server, hub.environment(server.endpoint, cache):
        ...  # configs/*.py as users type them, in this process or in one that it starts

`python -m tests.hub DIR` writes the repositories, for a look or for another process.
"""

from .client import environment, variables
from .server import Server, serve
from .write import biomedclip_folder, clip_folder, pipeline_folders, write_all

__all__ = [
    "Server",
    "biomedclip_folder",
    "clip_folder",
    "environment",
    "pipeline_folders",
    "serve",
    "variables",
    "write_all",
]
