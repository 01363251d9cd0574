"""Operations: metrics, logs, and what belongs to a process: signals, child processes, ports."""
