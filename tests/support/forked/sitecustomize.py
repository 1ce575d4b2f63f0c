"""In the path of all servers that tests start (tests/conftest.py): SGLang's processes are forked, not spawned.

A spawned process imports SGLang again, 24 s of a core for each of two. Forking is safe here: the first process has
computed nothing when it starts the others. tests/start/test_platform.py starts a server as it is.
"""

import multiprocessing

_set_start_method = multiprocessing.set_start_method
multiprocessing.set_start_method = lambda method, force=False: _set_start_method("fork", force=True)
