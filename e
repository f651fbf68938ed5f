On the CPU: weights are loaded as float32.
error: cannot load model '/nope' (Repo id must use alphanumeric chars, '-', '_' or '.'. The name cannot start or end with '-' or '.' and the maximum length is 96: '/nope'.); give a folder with config.json and safetensors, or a hub id such as 'mlx-community/Llama-3.2-3B-Instruct-4bit'
