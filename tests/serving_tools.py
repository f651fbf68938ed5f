"""A server in this process, on a free port, for the tests that ask one."""

import argparse
import contextlib
import http.client
import json
import re
import threading
import time

import openai
from helpers import MODEL

from mlx_turboquant.integrations import server
from mlx_turboquant.integrations.prompt_store import PromptStore
from mlx_turboquant.integrations.supervision import SupervisedGenerator
from mlx_turboquant.serving import app, guard, names, run, service
from mlx_turboquant.spec import CacheSpec

SPEC = CacheSpec.parse("k8v8,page=32,window=8")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
)
#: Seconds for what takes a moment: machines that run tests are busy.
LIMIT = 120
STORY = "The old man looked at the sea and thought of the years that had gone. " * 8


def until(condition):
    """Wait until something is so."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.01)


def options(**changes):
    defaults = {
        "model": str(MODEL),
        "adapter_path": None,
        "draft_model": None,
        "num_draft_tokens": 3,
        "trust_remote_code": False,
        "chat_template": TEMPLATE,
        "use_default_chat_template": False,
        "chat_template_args": {},
        "temp": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "max_tokens": 64,
        "decode_concurrency": 8,
        "prompt_concurrency": 4,
        "prefill_step_size": 256,
        "prompt_cache_size": 10,
        "prompt_cache_bytes": None,
        "pipeline": False,
        "kv_bits": None,
        "kv_group_size": 64,
        "quantized_kv_start": 0,
    }
    return argparse.Namespace(**{**defaults, **changes})


class Running:
    """A server and OpenAI's client of it."""

    def __init__(
        self,
        spec=SPEC,
        draft_spec=None,
        access=None,
        limits=None,
        kv_memory=None,
        allowed=(),
        folder=None,
        **changes,
    ):
        given = options(**changes)
        self.cache = PromptStore(
            given.prompt_cache_size, given.prompt_cache_bytes or 1 << 63, folder
        )
        provider = server.Provider(given, spec, draft_spec)
        self.generator = SupervisedGenerator(provider, self.cache, kv_memory)
        self.generator.wait_until_loaded()
        known = names.Names(
            given.model,
            given.adapter_path,
            given.draft_model,
            names.parse_allowed(allowed),
        )
        self.service = service.Service(
            self.generator, known, given, limits or service.Limits(), "test"
        )
        made = app.application(self.service, access or guard.Access())
        bound = run.listen("127.0.0.1", 0)
        self.port = bound.getsockname()[1]
        self.http = run.WebServer(made, self.generator, 1)
        self._thread = threading.Thread(target=self.http.run, args=([bound],))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120
        )

    def complete(self, prompt, **changes):
        request = {"max_tokens": 12, "temperature": 0, **changes}
        return self.client.completions.create(
            model="default_model", prompt=prompt, **request
        )

    def chat(self, messages, **changes):
        request = {"max_tokens": 12, "temperature": 0, **changes}
        return self.client.chat.completions.create(
            model="default_model", messages=messages, **request
        )

    def raw(self, body, headers=None, method="POST", path="/v1/completions"):
        """(status, parsed answer) of a request that no client would send."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body=body, headers=headers or {})
            with connection.getresponse() as answer:
                text = answer.read()
        return answer.status, json.loads(text) if text.startswith(b"{") else text

    def ask(self, path="/v1/completions", **fields):
        """The same of fields."""
        return self.raw(json.dumps(fields), path=path)

    def settled(self):
        """(texts, bytes) that are kept, once all that was asked for is over.

        An answer ends for its client before its text is kept.
        """
        generator = self.generator
        until(lambda: not generator.open_tickets())
        begun = time.monotonic()
        until(lambda: generator._counted_at > begun)
        return generator.kept

    def generated(self):
        """Tokens that were written so far, of answers that are over."""
        text = self.raw(None, method="GET", path="/metrics")[1].decode()
        return float(re.search(r'tokens_total{kind="generated"} (\S+)', text)[1])

    def is_well(self):
        """It answers, and its thread has met nothing that it did not expect."""
        status, answer = self.ask(prompt="The", max_tokens=1)
        return (
            status == 200
            and answer["usage"]["completion_tokens"] == 1
            and self.generator.is_healthy
            and self.generator.faults == 0
        )

    def close(self):
        self.client.close()
        self.http.should_exit = True
        self._thread.join()
        # Hooks stay until the module's end: another server may be running.
        self.generator.stop_and_join()
