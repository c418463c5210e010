"""What a stage will take: operations, bytes and the machine's speed -> seconds, memory and disk."""
