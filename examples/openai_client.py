"""The openai package against mlx_tq.server, which runs beside this:

    pip install 'mlx-tq[server]'
    mlx_tq.server --model mlx-community/Llama-3.2-3B-Instruct-4bit --kv-bits 4

python openai_client.py [http://127.0.0.1:8080/v1]
"""

import sys

try:
    from openai import OpenAI
except ImportError:
    sys.exit("this example needs OpenAI's client: pip install openai")

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080/v1"
client = OpenAI(base_url=url, api_key="none needed")
model = "default_model"  # the one that the server was started with

messages = [{"role": "user", "content": "Tell me of the sea."}]
for _ in range(2):
    # Each turn sends the whole chat; what the server has read before is in its store of
    # compressed caches, so that only the rest takes time.
    stream = client.chat.completions.create(
        model=model, messages=messages, max_tokens=24, stream=True
    )
    answer = "".join(part.choices[0].delta.content or "" for part in stream)
    print(f"{answer}\n")
    messages += [
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "And then?"},
    ]
