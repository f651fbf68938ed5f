On the CPU: weights are loaded as float32.
