"""Where an edit's subject ends: the token at which its key is read and its value is written."""

from __future__ import annotations

from clkit.models.prompts import PromptFormat


def tokens_after(form: PromptFormat, prompt: str, target: str, subject: str | None) -> int:
    """How many tokens of the shown prompt come after the subject's last one; 0 = the prompt's last token.

    That token is also taken where no subject is given, or the prompt does not name it. Texts put before the prompt do
    not change the number.

    Args:
        form: how the prompt is shown.
        prompt: of the edit.
        target: its answer, with which the prompt is tokenised.
        subject: what the fact is about.
    """
    (shown,) = form.render([prompt])
    start = shown.rfind(prompt)
    found = prompt.rfind(subject) if subject else -1
    if found < 0 or start < 0:
        return 0
    end = start + found + len(subject or "")
    target = target.lstrip() if form.chat else target  # its white space does not reach into a template
    text = shown + form.separator(shown, target) + target
    offsets = form.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    inside = sum(begin < end for begin, _ in offsets)
    (tokens,) = form.tokenise([shown], [target])
    answer = tokens.answer - (len(tokens.ids) - len(offsets))  # without BOS
    return int(max(answer - inside, 0))
