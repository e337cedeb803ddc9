"""Text in, text out: answers, chats, sessions, saved caches, the evaluation harness."""
