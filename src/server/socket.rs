//! A connection's socket. It fails when its reader takes nothing for too long, gives the refusals
//! that hyper writes by itself the body of every other error, and closes only after the client
//! could read the answer.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::http::StatusCode;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Instant, Sleep, sleep},
};

use super::ApiError;

/// Largest header of a request, bytes, and most lines of one.
pub(super) const MAX_HEADER_BYTES: usize = 64 << 10;
pub(super) const MAX_HEADERS: usize = 128;
/// Time for a client that still sends to see that it was answered. Closing earlier resets the
/// connection, and the answer may be lost.
const LINGER: Duration = Duration::from_secs(1);

pub(super) struct Socket {
    socket: TcpStream,
    limit: Duration,
    /// Runs while a write waits, and while the socket closes.
    patience: Pin<Box<Sleep>>,
    waiting: bool,
    /// What goes out in place of hyper's bytes, and how much of it has gone.
    refusal: Option<(Vec<u8>, usize)>,
    closing: bool,
}

impl Socket {
    pub(super) fn new(socket: TcpStream, limit: Duration) -> Self {
        let patience = Box::pin(sleep(limit));
        Self { socket, limit, patience, waiting: false, refusal: None, closing: false }
    }

    fn watch<T>(&mut self, cx: &mut Context<'_>, poll: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if poll.is_ready() {
            self.waiting = false;
            return poll;
        }
        if !std::mem::replace(&mut self.waiting, true) {
            self.patience.as_mut().reset(Instant::now() + self.limit);
        }
        match self.patience.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }

    /// Writes what hyper wants to be written, or the whole refusal in its place.
    fn write(
        &mut self,
        cx: &mut Context<'_>,
        first: &[u8],
        plain: impl FnOnce(Pin<&mut TcpStream>, &mut Context<'_>) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        if self.refusal.is_none() {
            self.refusal = refusal(first).map(|bytes| (bytes, 0));
        }
        let Some((bytes, sent)) = &mut self.refusal else {
            return plain(Pin::new(&mut self.socket), cx);
        };
        while *sent < bytes.len() {
            *sent += ready!(Pin::new(&mut self.socket).poll_write(cx, &bytes[*sent..]))?;
        }
        self.refusal = None;
        Poll::Ready(Ok(first.len()))
    }

    /// Reads on, for nothing, until the client is done or out of time.
    fn linger(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut waste = [0; 4096];
        while self.patience.as_mut().poll(cx).is_pending() {
            let mut buffer = ReadBuf::new(&mut waste);
            let read = ready!(Pin::new(&mut self.socket).poll_read(cx, &mut buffer));
            if read.is_err() || buffer.filled().is_empty() {
                break;
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// The message of a 431.
pub(super) fn too_large() -> String {
    format!("the header has more than {} KiB or {MAX_HEADERS} lines", MAX_HEADER_BYTES >> 10)
}

/// The whole answer in place of `head`, if that is a refusal without a body. The app's own answers
/// to faults have one, so this is from hyper, which could not parse the request.
fn refusal(head: &[u8]) -> Option<Vec<u8>> {
    let head = head.strip_prefix(b"HTTP/1.1 4").filter(|rest| rest.ends_with(b"\r\n\r\n"))?;
    let head = std::str::from_utf8(head).ok().filter(|h| h.contains("content-length: 0\r\n"))?;
    let (status, message) = match head.get(..2)? {
        "00" => (StatusCode::BAD_REQUEST, "the request is no valid HTTP/1.1".to_owned()),
        "14" => (StatusCode::URI_TOO_LONG, "the path is too long".to_owned()),
        "31" => (StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, too_large()),
        _ => return None,
    };
    let body = ApiError::new(status, message).body().to_string();
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\
         connection: close\r\n\r\n"
    );
    Some((head + &body).into_bytes())
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_read(cx, buf)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let poll = self.write(cx, buf, |socket, cx| socket.poll_write(cx, buf));
        self.watch(cx, poll)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let poll = Pin::new(&mut self.socket).poll_flush(cx);
        self.watch(cx, poll)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.closing {
            let poll = Pin::new(&mut self.socket).poll_shutdown(cx);
            ready!(self.watch(cx, poll))?;
            self.closing = true;
            self.patience.as_mut().reset(Instant::now() + LINGER);
        }
        self.linger(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let first = bufs.first().map_or(&[][..], |buf| buf);
        let poll = self.write(cx, first, |socket, cx| socket.poll_write_vectored(cx, bufs));
        self.watch(cx, poll)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_bare_refusals_are_replaced() {
        let bare = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\n\
            content-length: 0\r\n\r\n";
        let answer = String::from_utf8(refusal(bare).unwrap()).unwrap();
        assert!(answer.starts_with("HTTP/1.1 431 Request Header Fields Too Large\r\n"));
        assert!(answer.contains("\"code\":431"), "{answer}");
        for other in [
            &b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"[..],
            b"HTTP/1.1 400 Bad Request\r\ncontent-length: 10\r\n\r\n",
            b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\ndata",
            b"data: HTTP/1.1 400",
            b"",
        ] {
            assert!(refusal(other).is_none());
        }
    }
}
