"""Python client of `reasonpix serve`.

```python
with reasonpix.Client("http://127.0.0.1:8000") as client:
    client.edit("street.jpg", "it got cold over night").save("edited.png")
```
"""

from __future__ import annotations

from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING

from PIL import Image

from reasonpix.core.images import UndecodableImage, decode, encode_png, rgb
from reasonpix.core.network import http_transport, proxy_for
from reasonpix.errors import ReasonpixError, require_extra

if TYPE_CHECKING:
    import httpx2

_RETRY_STATUSES = (429, 503)


class Client:
    """Edits images on the server at `url`; `token` is needed if the server has one.

    `timeout` is in seconds for one edit, including retries: when the server is full or not ready,
    the request is repeated after its Retry-After. Threads may share a client.
    """

    def __init__(self, url: str, token: str | None = None, *, timeout: float = 600) -> None:
        with require_extra("client"):
            import httpx2
        if not isinstance(url, str):
            raise ReasonpixError(
                f"{url!r}: not a server address; give one as text, such as http://127.0.0.1:8000"
            )
        self._url = url.rstrip("/")
        self._timeout = timeout
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        proxy = proxy_for(self._url)
        self._where = f"{self._url} (through the proxy of {proxy.variable})" if proxy else self._url
        try:
            # One connection for each thread that edits.
            transport = http_transport(self._url, limits=httpx2.Limits(max_connections=None))
            self._http = httpx2.Client(base_url=self._url, headers=headers, transport=transport)
        except (httpx2.InvalidURL, ValueError) as error:
            raise ReasonpixError(f"{url}: not a server address: {error}") from error

    def edit(
        self,
        image: Image.Image | Path | str,
        instruction: str,
        *,
        seed: int = 0,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        resolution: int | None = None,
    ) -> Image.Image:
        """The edited image, RGB, in the size of the input.

        `image` is a PIL image of any mode or a path, whose file is sent as it is. Settings left
        None are the model's own. Raises `ReasonpixError` with the server's message if it rejects
        the edit, or if there is no response in time.
        """
        settings = {
            "guidance_scale": guidance_scale,
            "image_guidance_scale": image_guidance_scale,
            "steps": num_inference_steps,
            "resolution": resolution,
        }
        fields = {name: str(value) for name, value in settings.items() if value is not None}
        fields |= {"instruction": instruction, "seed": str(seed)}
        files = {"image": ("image", _read_image(image))}
        deadline = monotonic() + self._timeout
        while True:
            response = self._post(fields, files, deadline - monotonic())
            if response.status_code == 200:
                break
            seconds = _retry_after(response)
            if response.status_code not in _RETRY_STATUSES or monotonic() + seconds > deadline:
                raise ReasonpixError(f"{self._where}: {_error_detail(response)}")
            sleep(seconds)
        try:
            return decode(response.content)
        except UndecodableImage as error:
            raise ReasonpixError(
                f"{self._where}: the answer is not an image ({error}); is this a reasonpix server?"
            ) from error

    def _post(
        self, fields: dict[str, str], files: dict[str, tuple[str, bytes]], seconds: float
    ) -> httpx2.Response:
        import httpx2

        try:
            return self._http.post("/v1/edits", data=fields, files=files, timeout=max(0, seconds))
        except httpx2.TimeoutException as error:
            raise ReasonpixError(
                f"{self._where}: no answer within {self._timeout:g} s; use a longer timeout "
                "or fewer steps"
            ) from error
        except httpx2.HTTPError as error:
            raise ReasonpixError(
                f"{self._where} cannot be reached: {error}; is the server running?"
            ) from error

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Client:
        """The client itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connections."""
        self.close()


def _read_image(image: Image.Image | Path | str) -> bytes:
    try:
        if isinstance(image, Image.Image):
            return encode_png(rgb(image))
        return Path(image).read_bytes()
    except UndecodableImage as error:
        raise ReasonpixError(f"image: {error}") from error
    except OSError as error:
        raise ReasonpixError(f"{image}: {error.strerror or error}") from error


def _retry_after(response: httpx2.Response) -> float:
    """Seconds to wait; one if the header is missing or a date, as a proxy may send."""
    value = response.headers.get("retry-after", "")
    return max(1, int(value)) if value.isdecimal() else 1


def _error_detail(response: httpx2.Response) -> str:
    try:
        return str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return (
            f"status {response.status_code} without an error message; is this a reasonpix server?"
        )
