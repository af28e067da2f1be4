//! The socket: accepts connections, bounds their number and their time, and drains them when
//! asked to stop. `axum::serve` has neither header timeouts nor a limit on silent readers.

use std::{io, sync::Arc, time::Duration};

use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto, graceful::GracefulShutdown},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};

use super::{
    ApiError, App, app,
    socket::{MAX_HEADER_BYTES, MAX_HEADERS, Socket},
};

/// Time for the last bytes after all requests have ended.
const CLOSING: Duration = Duration::from_secs(2);

/// Serves until `stop` resolves, then refuses new requests, waits for the open ones up to the
/// shutdown timeout or `force`, and closes. Returns early if the engine dies.
///
/// # Errors
/// The socket's.
pub async fn listen(
    listener: TcpListener,
    state: Arc<App>,
    stop: impl Future<Output = ()>,
    force: impl Future<Output = ()>,
) -> io::Result<()> {
    let slots = Arc::new(Semaphore::new(state.config.max_connections));
    let graceful = GracefulShutdown::new();
    let service = TowerToHyperService::new(app(state.clone()));
    let builder = builder(state.config.header_timeout);
    let ending = async {
        tokio::select! {
            () = stop => {}
            () = engine_death(&state) => {}
        }
        state.drain();
        // Health checks are answered while requests drain, so connections are still accepted.
        tokio::select! {
            _ = timeout(state.config.shutdown_timeout, no_requests(&state)) => {}
            () = force => {}
        }
        state.engine.fail_all(ApiError::unavailable("the server is shutting down"));
        let _ = timeout(CLOSING, no_requests(&state)).await;
    };
    tokio::pin!(ending);
    loop {
        let accepted = tokio::select! {
            () = &mut ending => break,
            accepted = accept(&listener, &slots) => accepted,
        };
        let (socket, slot) = match accepted {
            Ok(accepted) => accepted,
            // Too many open files, or a client that left at once: neither ends the server.
            Err(_) => {
                sleep(Duration::from_millis(20)).await;
                continue;
            }
        };
        let io = TokioIo::new(Socket::new(socket, state.config.write_timeout));
        let connection = builder.serve_connection(io, service.clone()).into_owned();
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            // Broken connections are the client's business.
            let _ = connection.await;
            drop(slot);
        });
    }
    let _ = timeout(CLOSING, graceful.shutdown()).await;
    Ok(())
}

fn builder(header_timeout: Duration) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new()).http1_only();
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(header_timeout)
        .max_buf_size(MAX_HEADER_BYTES)
        .max_headers(MAX_HEADERS);
    builder
}

async fn accept(
    listener: &TcpListener,
    slots: &Arc<Semaphore>,
) -> io::Result<(TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    let slot = slots.clone().acquire_owned().await.map_err(io::Error::other)?;
    let (socket, _) = listener.accept().await?;
    socket.set_nodelay(true)?;
    Ok((socket, slot))
}

async fn no_requests(state: &App) {
    while state.engine.n_open() > 0 {
        sleep(Duration::from_millis(20)).await;
    }
}

async fn engine_death(state: &App) {
    while state.engine.death().is_none() {
        sleep(Duration::from_millis(500)).await;
    }
}
