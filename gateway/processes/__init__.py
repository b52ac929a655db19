"""The parent and its children: workers that serve, services that backends asked for, and nobody left behind."""
