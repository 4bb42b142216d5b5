"""Link arXiv ids in docstrings to their papers."""

import re

ARXIV = re.compile(r"arXiv:(\d{4}\.\d{5})(?!</a>)")


def on_page_content(html: str, **_) -> str:
    return ARXIV.sub(r'<a href="https://arxiv.org/abs/\1">\g<0></a>', html)
